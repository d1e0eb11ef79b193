"""Images and captions: files, arrays, batches, random draws and the cache of encoded images."""
