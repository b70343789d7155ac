"""What trains besides the model's own weights, or in their place: LoRA, DoRA, QLoRA, freezing."""
