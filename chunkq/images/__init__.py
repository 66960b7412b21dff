"""Images that a network sees whole: lists of files, decoding, results and keypoints."""
