"""Tokenized examples to device batches: mixture, packing plan and loader."""
