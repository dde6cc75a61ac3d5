"""An elastic, quantizable view of a pretrained model: genomes become sub-networks, active or extracted."""
