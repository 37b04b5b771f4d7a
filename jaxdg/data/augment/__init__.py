"""What training does to images and their labels on the host: crops, RandAugment, PixMix."""
