"""Files of bases: where they are stored, how they are downloaded, verified and mapped."""
