"""The demo: composed scenes of emoji, the whole job on them, the judge of the pictures, the report."""
