"""A model on its way: encoded and signed at its sender; checked and decoded at its receiver."""
