def handlers(config): return {}
