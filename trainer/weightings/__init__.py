"""The weightings, one file per family; `trainer.weighting` is the public place and lists them all."""
