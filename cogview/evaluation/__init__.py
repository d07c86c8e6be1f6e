"""Models that draw pictures of captions, judged by machine (CogView paper, section 4.1, table 1 and figure 9)."""
