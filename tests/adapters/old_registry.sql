-- A registry as it was before schemas were numbered.
BEGIN TRANSACTION;
CREATE TABLE adapters (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	name VARCHAR(128) NOT NULL, 
	deleted BOOLEAN NOT NULL, 
	created DATETIME NOT NULL, 
	metadata JSON NOT NULL, 
	UNIQUE (name)
);
INSERT INTO "adapters" VALUES(1,'sql',0,'2026-11-28 05:59:21.400038','{"team": "a"}');
CREATE TABLE aliases (
	adapter_id INTEGER NOT NULL, 
	alias VARCHAR(128) NOT NULL, 
	number INTEGER NOT NULL, 
	PRIMARY KEY (adapter_id, alias), 
	FOREIGN KEY(adapter_id, number) REFERENCES versions (adapter_id, number), 
	FOREIGN KEY(adapter_id) REFERENCES adapters (id)
);
INSERT INTO "aliases" VALUES(1,'prod',1);
CREATE TABLE versions (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	adapter_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	digest VARCHAR(71) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	created DATETIME NOT NULL, 
	rank INTEGER NOT NULL, 
	alpha DOUBLE NOT NULL, 
	rslora BOOLEAN NOT NULL, 
	target_modules JSON NOT NULL, 
	dtype VARCHAR(64) NOT NULL, 
	bytes BIGINT NOT NULL, 
	parameters BIGINT NOT NULL, 
	base_model TEXT, 
	source TEXT NOT NULL, 
	checks JSON NOT NULL, 
	algebra JSON NOT NULL, 
	reason TEXT, 
	pinned BOOLEAN, 
	lasting BOOLEAN, 
	UNIQUE (adapter_id, number), 
	FOREIGN KEY(adapter_id) REFERENCES adapters (id)
);
INSERT INTO "versions" VALUES(1,1,1,'sha256:0000000000000000000000000000000000000000000000000000000000000001','ready','2026-11-28 05:59:21.407132',8,16.0,0,'["q_proj", "v_proj"]','BF16',1952376,976188,'org/base','upload','{"problems": [], "warnings": []}','{"parameters": 1, "layers": [{"module": "\u00fc"}]}',NULL,NULL,NULL);
INSERT INTO "versions" VALUES(2,1,2,'sha256:0000000000000000000000000000000000000000000000000000000000000002','ready','2026-11-28 05:59:21.421893',8,16.0,0,'["q_proj", "v_proj"]','BF16',1952376,976188,'org/base','upload','{"problems": [], "warnings": []}','{"parameters": 1, "layers": [{"module": "\u00fc"}]}',NULL,NULL,NULL);
CREATE INDEX ix_versions_digest ON versions (digest);
CREATE INDEX ix_versions_source ON versions (source);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('adapters',1);
INSERT INTO "sqlite_sequence" VALUES('versions',2);
COMMIT;
