"""What a model's attention heads do (CogView paper, arXiv 2105.13290, appendix C): measured, named and drawn."""
