"""Two views of one image: crops, augmentation, the region they share, retrieval of patches."""
