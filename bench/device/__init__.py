"""Everything about fastkd that only a GPU can tell, measured in ten minutes: ``python -m bench.device --out DIR``."""
