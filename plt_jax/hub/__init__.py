"""The Hugging Face Hub. Only this room imports huggingface_hub, and only where a name is used."""
