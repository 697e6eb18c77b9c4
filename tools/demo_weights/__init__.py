"""Training of the demo's weights from scratch: `python run.py train-demo`, or one stage after the other.

`autoencoder`, `decoder`, `base` and `ship-base` make the base; `style` a LoRA for it; `controls` the controls of the
recipes demo_*.toml, on the shipped base, with controlnext_training; `ship-controls` packs both. Data are the scenes
drawn by controlnext_training/synthetic.py. All stages are resumable: one that was stopped, or whose process was killed,
continues from its last state in .cache/demo_weights, and a finished one is not run again.
"""
