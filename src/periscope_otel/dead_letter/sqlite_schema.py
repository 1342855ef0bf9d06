"""The tables of the SQLite store, beside those of others in the same file."""

from __future__ import annotations

from typing import Final

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS letters (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    queue TEXT NOT NULL,
    state TEXT NOT NULL,
    revision INTEGER NOT NULL DEFAULT 1,
    operation TEXT NOT NULL,
    feed TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    error_type TEXT NOT NULL,
    same TEXT NOT NULL,             -- equal for the same payload under the same idempotency key
    failed_at REAL NOT NULL,
    not_before REAL NOT NULL,
    attempts INTEGER NOT NULL,
    replays INTEGER NOT NULL DEFAULT 0,
    leases INTEGER NOT NULL DEFAULT 0,      -- that ran out
    owner TEXT,                     -- of a claim, with its end and the state before it
    until REAL,
    before TEXT,
    size INTEGER NOT NULL,
    letter BLOB,                    -- unless it is long
    latest BLOB,                    -- its latest failure, if that is not the one in the letter
    UNIQUE (id, queue)
) STRICT;
CREATE TABLE IF NOT EXISTS letter_blobs (seq INTEGER PRIMARY KEY, letter BLOB NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS letters_by_state ON letters (queue, state, seq);
CREATE INDEX IF NOT EXISTS letters_by_age ON letters (queue, failed_at) WHERE state = 'dead';
CREATE INDEX IF NOT EXISTS letters_by_fingerprint ON letters (queue, fingerprint, seq);
CREATE INDEX IF NOT EXISTS letters_by_feed ON letters (queue, feed, seq);
CREATE INDEX IF NOT EXISTS letters_by_same ON letters (same) WHERE state <> 'claimed';
CREATE INDEX IF NOT EXISTS letters_by_lease ON letters (queue, until) WHERE state = 'claimed';

-- Letters that are done, so that one which comes late from somewhere does not come back.
CREATE TABLE IF NOT EXISTS removed (
    id TEXT, queue TEXT, until REAL NOT NULL, PRIMARY KEY (id, queue)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS removed_by_time ON removed (until);

-- Counts by state, feed and cause (fingerprint). They are in one table, so that a put writes one
-- page for them; of the causes the most frequent are found by an index.
CREATE TABLE IF NOT EXISTS letter_counts (
    queue TEXT, kind TEXT, name TEXT, letters INTEGER NOT NULL, size INTEGER NOT NULL,
    PRIMARY KEY (queue, kind, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS letter_causes ON letter_counts (queue, letters) WHERE kind = 'cause';

CREATE TRIGGER IF NOT EXISTS letters_added AFTER INSERT ON letters BEGIN
    INSERT INTO letter_counts VALUES
        (new.queue, 'state', new.state, 1, new.size),
        (new.queue, 'feed', new.feed, 1, 0),
        (new.queue, 'cause', new.fingerprint, 1, 0)
    ON CONFLICT DO UPDATE SET letters = letters + 1, size = size + excluded.size;
END;
CREATE TRIGGER IF NOT EXISTS letters_removed AFTER DELETE ON letters BEGIN
    DELETE FROM letter_blobs WHERE seq = old.seq;
    UPDATE letter_counts SET letters = letters - 1, size = size - old.size
    WHERE queue = old.queue AND kind = 'state' AND name = old.state;
    UPDATE letter_counts SET letters = letters - 1
    WHERE queue = old.queue AND kind = 'feed' AND name = old.feed;
    UPDATE letter_counts SET letters = letters - 1
    WHERE queue = old.queue AND kind = 'cause' AND name = old.fingerprint;
    DELETE FROM letter_counts
    WHERE queue = old.queue AND kind IN ('state', 'feed', 'cause')
        AND name IN (old.state, old.feed, old.fingerprint) AND letters = 0;
END;
CREATE TRIGGER IF NOT EXISTS letters_moved AFTER UPDATE OF state, size ON letters
WHEN old.state <> new.state OR old.size <> new.size BEGIN
    UPDATE letter_counts SET letters = letters - 1, size = size - old.size
    WHERE queue = old.queue AND kind = 'state' AND name = old.state;
    INSERT INTO letter_counts VALUES (new.queue, 'state', new.state, 1, new.size)
    ON CONFLICT DO UPDATE SET letters = letters + 1, size = size + excluded.size;
END;
CREATE TRIGGER IF NOT EXISTS letters_failed AFTER UPDATE OF fingerprint ON letters
WHEN old.fingerprint <> new.fingerprint BEGIN
    UPDATE letter_counts SET letters = letters - 1
    WHERE queue = old.queue AND kind = 'cause' AND name = old.fingerprint;
    DELETE FROM letter_counts
    WHERE queue = old.queue AND kind = 'cause' AND name = old.fingerprint AND letters = 0;
    INSERT INTO letter_counts VALUES (new.queue, 'cause', new.fingerprint, 1, 0)
    ON CONFLICT DO UPDATE SET letters = letters + 1;
END;
"""
