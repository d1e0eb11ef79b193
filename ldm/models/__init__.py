"""The networks: UNet, autoencoder, text encoder, CLIP and Inception."""
