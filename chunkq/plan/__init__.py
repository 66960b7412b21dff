"""The plan of an item: chunks, patches, pieces and costs. No I/O."""
