"""A model on its way: encoded and signed at its sender; checked, decoded and judged at its receiver."""
