"""What is learnt from? Records of text and pictures in files, streamed in an order that can be resumed, in batches."""
