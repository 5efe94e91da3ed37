//! The configuration file as it is written, and every default, said once.
//!
//! Mirrors the file; nothing here is checked. The rest of the program never sees these types.

use std::collections::BTreeMap;
use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, SeqAccess, Visitor},
};

use zeroize::Zeroizing;

use crate::config::tls::RawTls;

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Raw {
    pub(crate) relay: RawRelay,
    pub(crate) upstream: RawUpstream,
    pub(crate) downstream: RawDownstream,
    pub(crate) store: RawStore,
    pub(crate) admin: RawAdmin,
    pub(crate) log: RawLog,
}

/// `[relay]`
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RawRelay {
    pub(crate) name: Option<String>,
    pub(crate) data_dir: Option<String>,
    pub(crate) data_must_exist: bool,
}

/// `[upstream]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RawUpstream {
    pub(crate) conninfo: Option<Secret>,
    pub(crate) patroni: Vec<String>,
    pub(crate) slot: Option<String>,
    pub(crate) create_slot: bool,
    pub(crate) slot_wal_keep_max: Quantity,
    pub(crate) acknowledge: String,
    pub(crate) acknowledge_timeout: Quantity,
    pub(crate) acknowledge_users: BTreeMap<String, String>,
    pub(crate) only_copy_time_max: Quantity,
    pub(crate) expect_sync: bool,
    pub(crate) hot_standby_feedback: bool,
    pub(crate) on_divergence: String,
    pub(crate) link: String,
    pub(crate) link_codecs: Vec<String>,
    pub(crate) link_retry_interval: Quantity,
    pub(crate) wal_receiver_timeout: Quantity,
    pub(crate) wal_receiver_status_interval: Quantity,
    pub(crate) wal_retrieve_retry_interval: Quantity,
}

/// `[downstream]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RawDownstream {
    pub(crate) listen: OneOrMany,
    pub(crate) tls: Option<RawTls>,
    pub(crate) users: Option<String>,
    pub(crate) hba: Option<String>,
    pub(crate) ident: Option<String>,
    pub(crate) trust_local: bool,
    pub(crate) allow_remote_trust: bool,
    pub(crate) allow_plaintext: bool,
    pub(crate) send: String,
    pub(crate) send_to: BTreeMap<String, String>,
    pub(crate) create_slots: bool,
    pub(crate) link_codecs: Vec<String>,
    pub(crate) link_adapt: bool,
    pub(crate) link_rate_max: Quantity,
    pub(crate) links_rate_max: Quantity,
    pub(crate) wal_sender_timeout: Quantity,
    pub(crate) tcp_keepalives_idle: Quantity,
    pub(crate) tcp_keepalives_interval: Quantity,
    pub(crate) tcp_keepalives_count: i64,
    pub(crate) tcp_user_timeout: Quantity,
    pub(crate) max_wal_senders: i64,
    pub(crate) authentication_timeout: Quantity,
    pub(crate) unauthenticated_connections_max: i64,
    pub(crate) unauthenticated_connections_per_address_max: i64,
}

/// `[store]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RawStore {
    pub(crate) wal_keep_size: Quantity,
    pub(crate) max_slot_wal_keep_size: Quantity,
    pub(crate) max_wal_size: Quantity,
    pub(crate) idle_replication_slot_timeout: Quantity,
    pub(crate) retain_without_slot: Quantity,
    pub(crate) disk_budget: Quantity,
    pub(crate) scrub_interval: Quantity,
    pub(crate) tail_size: Quantity,
    pub(crate) unwritten_size: Quantity,
    pub(crate) spare_segments: i64,
    pub(crate) reserve_segments: i64,
    pub(crate) max_replication_slots: i64,
}

/// `[admin]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RawAdmin {
    pub(crate) listen: String,
    pub(crate) allow_plaintext: bool,
    pub(crate) token_file: Option<String>,
    pub(crate) read_token_file: Option<String>,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RawLog {
    pub(crate) level: String,
    pub(crate) format: String,
}

impl Default for RawUpstream {
    fn default() -> Self {
        Self {
            conninfo: None,
            patroni: Vec::new(),
            slot: None,
            create_slot: true,
            slot_wal_keep_max: "0".into(),
            acknowledge: "local".to_owned(),
            acknowledge_timeout: "0".into(),
            acknowledge_users: BTreeMap::new(),
            only_copy_time_max: "0".into(),
            expect_sync: false,
            hot_standby_feedback: true,
            on_divergence: "follow".to_owned(),
            link: "prefer".to_owned(),
            link_codecs: vec!["zstd".to_owned(), "lz4".to_owned()],
            link_retry_interval: "5min".into(),
            wal_receiver_timeout: "60s".into(),
            wal_receiver_status_interval: "10s".into(),
            wal_retrieve_retry_interval: "5s".into(),
        }
    }
}

impl Default for RawDownstream {
    fn default() -> Self {
        Self {
            listen: OneOrMany(vec!["127.0.0.1:5433".to_owned()]),
            tls: None,
            users: None,
            hba: None,
            ident: None,
            trust_local: true,
            allow_remote_trust: false,
            allow_plaintext: false,
            send: "received".to_owned(),
            send_to: BTreeMap::new(),
            create_slots: false,
            link_codecs: vec!["zstd:1".to_owned(), "lz4".to_owned()],
            link_adapt: true,
            link_rate_max: "0".into(),
            links_rate_max: "0".into(),
            wal_sender_timeout: "60s".into(),
            tcp_keepalives_idle: "60s".into(),
            tcp_keepalives_interval: "10s".into(),
            tcp_keepalives_count: 6,
            tcp_user_timeout: "0".into(),
            max_wal_senders: 64,
            authentication_timeout: "60s".into(),
            unauthenticated_connections_max: 64,
            unauthenticated_connections_per_address_max: 16,
        }
    }
}

impl Default for RawStore {
    fn default() -> Self {
        Self {
            wal_keep_size: "1GB".into(),
            max_slot_wal_keep_size: "-1".into(),
            max_wal_size: "1GB".into(),
            idle_replication_slot_timeout: "0".into(),
            retain_without_slot: "0".into(),
            disk_budget: "0".into(),
            scrub_interval: "1d".into(),
            tail_size: "64MB".into(),
            unwritten_size: "64MB".into(),
            spare_segments: 2,
            reserve_segments: 4,
            max_replication_slots: 16,
        }
    }
}

impl Default for RawAdmin {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:9588".to_owned(),
            allow_plaintext: false,
            token_file: None,
            read_token_file: None,
        }
    }
}

impl Default for RawLog {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: "auto".to_owned() }
    }
}

/// A size or a duration as written. A bare number gets here too, so that the complaint can name the units.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Quantity(pub(crate) String);

impl From<&str> for Quantity {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrNumber;

        impl Visitor<'_> for TextOrNumber {
            type Value = Quantity;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number with a unit, in quotes")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Quantity, E> {
                Ok(Quantity::from(text))
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Quantity, E> {
                Ok(Quantity(number.to_string()))
            }
        }

        deserializer.deserialize_any(TextOrNumber)
    }
}

/// A text that may hold a password.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Secret(pub(crate) Zeroizing<String>);

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Zeroizing::new(text)))
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// One text, or a list of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct OneOrMany(pub(crate) Vec<String>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrList;

        impl<'de> Visitor<'de> for TextOrList {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<OneOrMany, E> {
                Ok(OneOrMany(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<OneOrMany, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = list.next_element()? {
                    texts.push(text);
                }
                Ok(OneOrMany(texts))
            }
        }

        deserializer.deserialize_any(TextOrList)
    }
}
