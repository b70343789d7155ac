"""Building blocks of models, and a model without its weights."""
