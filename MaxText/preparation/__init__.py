"""From any source of texts to token blocks: read, filtered, deduplicated, split and encoded, in restartable tasks."""
