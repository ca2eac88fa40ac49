"""``gcml inspect``: what a datalist holds, and where its sites differ."""
