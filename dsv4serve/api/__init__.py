"""HTTP: routes, schemas, SSE, auth, limits, error bodies."""
