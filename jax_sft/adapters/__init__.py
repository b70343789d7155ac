"""Choose what trains: LoRA, DoRA and QLoRA adapters, or a part of the model's own weights."""
