"""Pages stored by what earlier ones already hold: as references, as differences to similar spans, else as usual."""
