"""Pictures and captions: tar shards, folders of tokens, and writing files whole."""
