"""The operators in other people's models. Nothing here is imported by `import cogview_ops`, and each module imports the
package that it is for (transformers, diffusers) when it is used.

`natten`: NATTEN's functions, also those that it has dropped. `vision`: local attention in ViT, DINOv2 and Swin of
transformers. `diffusers`: attention processors.
"""
