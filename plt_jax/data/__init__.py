"""Text to training batches: corpus -> tokenizer -> tokens -> packing -> pipeline.

`load.load_data` runs the whole flow for a run's configuration; each module does one step of it.
"""
