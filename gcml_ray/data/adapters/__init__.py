"""From public data layouts to a datalist."""
