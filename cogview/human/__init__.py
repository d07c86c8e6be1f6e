"""Human evaluation: people score pictures of several models and choose the best of each caption (arXiv 2105.13290,
section 4.2 and appendix E). A form without a server, and what its answers come to."""
