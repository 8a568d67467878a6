"""What lies below the chapters: commands, checkpoints, caches, image folders, ranks, plots."""
