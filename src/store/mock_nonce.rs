//! What the salts of users that do not exist are derived from, over restarts.
//!
//! Owns the state file `walrelay.mock_nonce`, which is to a data directory what `mock_authentication_nonce` in `pg_control` is
//! to a server's: made once, with the directory, and never changed, so that nobody sees by a salt that he asks for somebody
//! who does not exist. Makes no random bytes itself, and does not know what they are for.

use serde::{Deserialize, Serialize};

use crate::store::Store;
use crate::store::error::StoreError;
use crate::store::shared::Shared;
use crate::store::state::StateFile;

impl Store {
    /// The bytes that are kept; where there are none yet, `fresh` is kept from now on, durably on return. Blocks.
    pub fn mock_nonce(&self, fresh: [u8; MOCK_NONCE_BYTES]) -> Result<[u8; MOCK_NONCE_BYTES], StoreError> {
        let Shared { disk, layout, .. } = &*self.shared;
        match MOCK_NONCE_FILE.read::<Content>(&**disk, &layout.data_dir) {
            Ok(Some(kept)) => return Ok(kept.nonce),
            // No WAL depends on it, and another one is as good.
            Ok(None) | Err(StoreError::Damaged { .. }) => {}
            Err(error) => return Err(error),
        }
        self.shared.health.check()?;
        let _file = self.shared.control_file.lock();
        if let Some(control) = self.shared.control.lock().clone() {
            control.check_owner(&**disk, layout)?;
        }
        let written = MOCK_NONCE_FILE.write(&**disk, &layout.data_dir, &Content { nonce: fresh });
        written.map_err(|error| self.shared.health.judge(error))?;
        Ok(fresh)
    }
}

#[derive(Serialize, Deserialize)]
struct Content {
    nonce: [u8; MOCK_NONCE_BYTES],
}

/// As many as a server has (`MOCK_AUTH_NONCE_LEN`).
pub const MOCK_NONCE_BYTES: usize = 32;

const MOCK_NONCE_FILE: StateFile =
    StateFile { name: "walrelay.mock_nonce", magic: *b"WRNONCE\0", version: 1 };

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use crate::store::disk::replace_durably;
    use crate::store::{RealDisk, small};

    #[test]
    fn what_was_kept_first_is_kept_over_restarts_and_by_the_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("data");
        let file = dir.join("walrelay.mock_nonce");
        let open = || small::open_in(&dir).0;
        assert_eq!(open().mock_nonce([1; 32]).unwrap(), [1; 32]);
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(open().mock_nonce([2; 32]).unwrap(), [1; 32]);
        // One that is damaged is made anew, and keeps nobody from his WAL.
        replace_durably(&RealDisk, &dir, "walrelay.mock_nonce", b"rotten").unwrap();
        assert_eq!(open().mock_nonce([3; 32]).unwrap(), [3; 32]);
        assert_eq!(open().mock_nonce([4; 32]).unwrap(), [3; 32]);
    }
}
