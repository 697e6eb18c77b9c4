"""Training of the demo's weights: `python run.py train-demo`, or one stage after the other.

For the UNet, `autoencoder` and `base` train slices, `ship-base` packs both, `controls` trains the ControlNet-XS
of the recipe demo_xs.toml on the shipped base, with controlnext_training, and `ship-controls` packs it. For the base of
SD3's shape, `picture-autoencoder` and `picture-base` train slices, `picture-dusk` a LoRA and `picture-print` a
fine-tune (minutes, from the start each time), `picture-controls` the controls of the demo's recipes picture_*.toml, and
`ship-pictures` packs what there is. Data are drawn by controlnext_core/picturebook. A slice that was stopped, or whose
process was killed, continues from its last state in .cache/demo_weights; the first one starts from the shipped weights.
"""
