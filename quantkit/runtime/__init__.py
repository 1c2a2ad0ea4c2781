"""The paged runtime: many requests at once over one checkpoint of any container."""
