"""GradNorm for users of other libraries: one module each, with that library's own interface and conventions."""
