"""What a node serves to its SM and IAM in place of the Main Node: CM, main IAM, blobs."""
