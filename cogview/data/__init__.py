"""Pictures and captions: tar shards, emoji, the demo's scenes, tokenised pairs, the judge of pictures."""
