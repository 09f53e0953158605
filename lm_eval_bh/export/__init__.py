"""Takes a policy to engines that do not know this package, and checks it there."""
