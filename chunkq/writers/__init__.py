"""Writers of images in the formats that others read."""
