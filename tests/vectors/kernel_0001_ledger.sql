-- A ledger as the first schema of kernel.db kept it.
BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('kernel_0001');
CREATE TABLE api_keys (
	id TEXT NOT NULL, 
	principal_id TEXT NOT NULL, 
	label TEXT NOT NULL, 
	secret_hmac BLOB NOT NULL, 
	models TEXT NOT NULL, 
	created_at TEXT NOT NULL, 
	expires_at TEXT, 
	revoked_at TEXT, 
	PRIMARY KEY (id), 
	FOREIGN KEY(principal_id) REFERENCES principals (id)
);
CREATE TABLE budget_events (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	reservation TEXT NOT NULL, 
	dataset TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	mechanism TEXT NOT NULL, 
	held_change BIGINT NOT NULL, 
	spent_change BIGINT NOT NULL, 
	at TEXT NOT NULL, 
	FOREIGN KEY(dataset) REFERENCES budget_pools (dataset)
);
INSERT INTO "budget_events" VALUES(1,'train-1','notes','reserve','{"noise_multiplier":1.5,"sampling_probability":0.1,"schema":"llmos.mechanism/v1","steps":7,"type":"poisson-sampled-gaussian"}',140,0,'2026-01-01T00:00:01.000Z');
INSERT INTO "budget_events" VALUES(2,'train-1','notes','commit','{"noise_multiplier":1.5,"sampling_probability":0.1,"schema":"llmos.mechanism/v1","steps":2,"type":"poisson-sampled-gaussian"}',-140,40,'2026-01-01T00:00:01.000Z');
INSERT INTO "budget_events" VALUES(3,'train-2','notes','reserve','{"noise_multiplier":1.5,"sampling_probability":0.1,"schema":"llmos.mechanism/v1","steps":7,"type":"poisson-sampled-gaussian"}',300,0,'2026-01-01T00:00:01.000Z');
CREATE TABLE budget_pools (
	dataset TEXT NOT NULL, 
	epsilon TEXT NOT NULL, 
	delta TEXT NOT NULL, 
	neighboring TEXT NOT NULL, 
	unit_column TEXT NOT NULL, 
	fingerprint TEXT NOT NULL, 
	renyi_order TEXT NOT NULL, 
	cap BIGINT NOT NULL, 
	spent BIGINT NOT NULL, 
	held BIGINT NOT NULL, 
	PRIMARY KEY (dataset), 
	CONSTRAINT never_overspent CHECK (spent >= 0 AND held >= 0 AND spent + held <= cap), 
	FOREIGN KEY(dataset) REFERENCES datasets (name)
);
INSERT INTO "budget_pools" VALUES('notes','0x1.8000000000000p+1','0x1.0c6f7a0b5ed8dp-20','add-or-remove-one','id','f','0x1.0000000000000p+3',9000,40,300);
CREATE TABLE budget_reservations (
	id TEXT NOT NULL, 
	dataset TEXT NOT NULL, 
	mechanism TEXT NOT NULL, 
	cost BIGINT NOT NULL, 
	steps_done BIGINT NOT NULL, 
	state TEXT NOT NULL, 
	PRIMARY KEY (id), 
	CONSTRAINT known_state CHECK (state IN ('held', 'committed', 'aborted')), 
	CONSTRAINT not_negative CHECK (cost >= 0 AND steps_done >= 0), 
	FOREIGN KEY(dataset) REFERENCES budget_pools (dataset)
);
INSERT INTO "budget_reservations" VALUES('train-1','notes','{"noise_multiplier":1.5,"sampling_probability":0.1,"schema":"llmos.mechanism/v1","steps":2,"type":"poisson-sampled-gaussian"}',40,2,'committed');
INSERT INTO "budget_reservations" VALUES('train-2','notes','{"noise_multiplier":1.5,"sampling_probability":0.1,"schema":"llmos.mechanism/v1","steps":7,"type":"poisson-sampled-gaussian"}',300,0,'held');
CREATE TABLE datasets (
	name TEXT NOT NULL, 
	classification TEXT NOT NULL, 
	purposes TEXT NOT NULL, 
	unit_column TEXT NOT NULL, 
	object_id TEXT NOT NULL, 
	fingerprint TEXT NOT NULL, 
	card TEXT NOT NULL, 
	created_at TEXT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "datasets" VALUES('notes','sensitive','["training"]','id','o','f','{}','2026-01-01T00:00:00.000Z');
CREATE TABLE jobs (
	id TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	principal TEXT NOT NULL, 
	request TEXT NOT NULL, 
	state TEXT NOT NULL, 
	cancel_requested INTEGER NOT NULL, 
	checkpoint TEXT, 
	result TEXT, 
	error TEXT, 
	created_at TEXT NOT NULL, 
	updated_at TEXT NOT NULL, 
	PRIMARY KEY (id), 
	CONSTRAINT known_job_state CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled'))
);
INSERT INTO "jobs" VALUES('train-1','train','admin','{"purpose": "training"}','done',0,NULL,NULL,NULL,'','');
INSERT INTO "jobs" VALUES('train-2','train','admin','{"purpose": "training"}','done',0,NULL,NULL,NULL,'','');
CREATE TABLE log_checkpoints (
	size BIGINT NOT NULL, 
	note TEXT NOT NULL, 
	PRIMARY KEY (size)
);
CREATE TABLE log_entries (
	idx BIGINT NOT NULL, 
	data BLOB NOT NULL, 
	PRIMARY KEY (idx)
);
CREATE TABLE log_nodes (
	level INTEGER NOT NULL, 
	idx BIGINT NOT NULL, 
	hash BLOB NOT NULL, 
	PRIMARY KEY (level, idx)
);
CREATE TABLE models (
	name TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	base TEXT, 
	location TEXT NOT NULL, 
	digest TEXT NOT NULL, 
	card TEXT NOT NULL, 
	created_at TEXT NOT NULL, 
	PRIMARY KEY (name), 
	FOREIGN KEY(base) REFERENCES models (name)
);
CREATE TABLE principals (
	id TEXT NOT NULL, 
	name TEXT NOT NULL, 
	roles TEXT NOT NULL, 
	created_at TEXT NOT NULL, 
	disabled_at TEXT, 
	PRIMARY KEY (id), 
	UNIQUE (name)
);
CREATE TABLE settings (
	name TEXT NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY (name)
);
CREATE TRIGGER budget_events_no_update BEFORE UPDATE ON budget_events BEGIN SELECT RAISE(ABORT, 'budget_events is append-only'); END;
CREATE TRIGGER budget_events_no_delete BEFORE DELETE ON budget_events BEGIN SELECT RAISE(ABORT, 'budget_events is append-only'); END;
COMMIT;
