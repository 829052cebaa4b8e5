"""Several machines, each with the whole model: an ingress that sends each request to one of their servers."""
