"""Everything that knows Ray, MLflow or storage: corpora in, shards, runs, bundles and registry entries out."""
