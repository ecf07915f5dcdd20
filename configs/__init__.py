"""Config files for `ppn --config=NAME`, importable as `ppn_jax.configs.NAME`."""
