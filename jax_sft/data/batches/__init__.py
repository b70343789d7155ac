"""Build device batches from tokenized examples: mixture, packing plan and loader."""
