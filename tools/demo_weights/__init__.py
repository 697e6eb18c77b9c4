"""Training of the demo's weights from scratch: `python run.py train-demo`, or one stage after the other.

For the base of plain shapes, `autoencoder`, `decoder`, `base` and `ship-base` make the base, `controls` the controls
of the recipes demo_*.toml on the shipped base, with controlnext_training, and `ship-controls` packs them. For the
base of SD3's shape, `picture-autoencoder` and `picture-base` train slices, `picture-style` a LoRA (minutes, from the
start each time), `picture-controls` the controls of the demo's recipes picture_*.toml, and `ship-pictures` packs what
there is. Data are drawn by controlnext_training/synthetic.py and controlnext_core/picturebook. The other stages are
resumable: one that was stopped, or whose process was killed, continues from its last state in .cache/demo_weights,
and a finished one is not run again.
"""
