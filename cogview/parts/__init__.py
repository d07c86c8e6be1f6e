"""What models are made of: embedding and head, attention, the stack of layers, the transformer around them."""
