"""Pictures with captions to train on: drawn ones, digits, a folder of your own."""
