def explain(error): return str(error)
