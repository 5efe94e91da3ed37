//! How the server sees us, beside the stream.
//!
//! Owns the questions that the stream cannot ask: whether the primary waits for this relay, whether somebody else uses its
//! name, and whether the WAL of a relay before us comes from ourselves. Each look is a connection of its own that ends at once,
//! for a primary's smart shutdown waits for sessions. Never disturbs the stream, but for ending it where it is a loop.

use std::time::Duration;

use tokio::sync::watch;

use crate::conninfo::{Conninfo, ProcessSurroundings};
use crate::protocol::instances::{Instances, PARAMETER};
use crate::status::UpstreamStatus;
use crate::upstream::dial::log_in;
use crate::upstream::dialog::{Dialog, Introduction};
use crate::upstream::{Opened, Upstream, UpstreamError};

/// One server, looked at as long as this is polled.
pub(super) struct Looking {
    /// For SQL; for replication where the server is a relay.
    conninfo: Conninfo,
    host: String,
    /// The server's process for our stream.
    pid: Option<u32>,
    is_relay: bool,
    instances: watch::Sender<Instances>,
    status: watch::Sender<UpstreamStatus>,
}

/// What a primary says of us.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    /// `None`: it does not say that to our user.
    sync_state: Option<String>,
    /// Others that report under our name.
    namesakes: u32,
}

impl Upstream {
    /// What is asked while the stream runs. Comes back only when it must not go on.
    pub(super) fn look_beside(&self, opened: &Opened) -> impl Future<Output = UpstreamError> + use<> {
        let is_relay = opened.introduction.parameters.contains_key(PARAMETER);
        let mut conninfo =
            if is_relay { self.settings.conninfo.clone() } else { self.settings.sql_conninfo.clone() };
        let name = conninfo.application_name.as_deref().unwrap_or("walrelay");
        conninfo.application_name = Some(format!("{name}{NAME_SUFFIX}"));
        let looking = Looking {
            conninfo,
            host: opened.host.clone(),
            pid: opened.introduction.process_id,
            is_relay,
            instances: self.instances.clone(),
            status: self.status.clone(),
        };
        looking.run()
    }
}

impl Looking {
    async fn run(self) -> UpstreamError {
        // Until it has reported something, nobody waits for a standby.
        let mut pause = FIRST_LOOK_DELAY;
        loop {
            tokio::time::sleep(pause).await;
            pause = match self.look().await {
                Ok(Some(seen)) => {
                    self.tell(seen);
                    LOOK_INTERVAL
                }
                Ok(None) => LOOK_INTERVAL,
                Err(error @ UpstreamError::Loop { .. }) => return error,
                Err(error) => {
                    tracing::debug!(error = %error.chain(), "could not ask the upstream how it sees this relay");
                    self.status.send_modify(|status| status.sync_state = None);
                    FAILED_LOOK_INTERVAL
                }
            };
        }
    }

    async fn look(&self) -> Result<Option<Seen>, UpstreamError> {
        let mut conninfo = self.conninfo.clone();
        conninfo.reread_passwords(&ProcessSurroundings);
        let host = conninfo.hosts.iter().find(|host| host.to_string() == self.host);
        let mut dialog = log_in(&conninfo, host.ok_or(UpstreamError::NoHost)?).await?;
        let heard = hear_instances(&dialog.introduction, &self.instances, &self.host);
        let seen = match (self.pid, self.is_relay) {
            (Some(pid), false) => ask(&mut dialog, pid).await.map(Some),
            _ => Ok(None),
        };
        dialog.terminate().await;
        heard.and(seen)
    }

    fn tell(&self, seen: Seen) {
        let Seen { sync_state, namesakes } = seen;
        let (state_before, namesakes_before) = {
            let status = self.status.borrow();
            (status.sync_state.clone(), status.namesakes)
        };
        if namesakes > namesakes_before {
            tracing::warn!(
                namesakes,
                "others report to the upstream under this relay's application_name: where synchronous_standby_names has it, \
                 commits may be confirmed by what they say"
            );
        }
        let is_waited_for = |state: &Option<String>| matches!(state.as_deref(), Some("sync" | "quorum"));
        if state_before != sync_state {
            let shown = sync_state.as_deref().unwrap_or("not told");
            if is_waited_for(&state_before) && !is_waited_for(&sync_state) {
                tracing::warn!(sync_state = shown, "the upstream does not wait for this relay any more");
            } else {
                tracing::info!(sync_state = shown, "how the upstream sees this relay");
            }
        }
        self.status.send_modify(|status| {
            (status.sync_state, status.namesakes) = (sync_state, namesakes);
        });
    }
}

/// Takes over what a server says of the relays before us, where it is one itself; that we are one of them is an error.
pub(super) fn hear_instances(
    introduction: &Introduction,
    instances: &watch::Sender<Instances>,
    host: &str,
) -> Result<(), UpstreamError> {
    let own = instances.borrow().clone();
    check_loop(introduction, &own, host)?;
    let now = own.behind(&heard(introduction));
    instances.send_if_modified(|instances| std::mem::replace(instances, now.clone()) != now);
    Ok(())
}

/// Refuses a server whose WAL comes from here.
pub(super) fn check_loop(
    introduction: &Introduction,
    own: &Instances,
    host: &str,
) -> Result<(), UpstreamError> {
    match own.place_in(&heard(introduction)) {
        Some(relays) => Err(UpstreamError::Loop { host: host.to_owned(), relays }),
        None => Ok(()),
    }
}

fn heard(introduction: &Introduction) -> Instances {
    introduction.parameters.get(PARAMETER).map_or_else(Instances::default, |text| Instances::parse(text))
}

/// A walsender of ours that the primary has not missed yet is no namesake: it has heard nothing since the newest began.
async fn ask(dialog: &mut Dialog, pid: u32) -> Result<Seen, UpstreamError> {
    let text = format!(
        "SELECT own.sync_state, (SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_replication other \
         WHERE other.pid <> own.pid AND pg_catalog.lower(other.application_name) = pg_catalog.lower(own.application_name) \
         AND other.reply_time > own.backend_start) \
         FROM pg_catalog.pg_stat_replication own WHERE own.pid = {pid}"
    );
    let rows = dialog.query_text(&text).await?;
    let column = |at: usize| rows.first().and_then(|row| row.text(at)).map(str::to_owned);
    let namesakes = column(1).and_then(|count| count.parse().ok()).unwrap_or(0);
    Ok(Seen { sync_state: column(0), namesakes })
}

/// Appended to the application name: nobody is to wait for this.
const NAME_SUFFIX: &str = "_look";

/// Time from the begin of a stream to the first look.
const FIRST_LOOK_DELAY: Duration = Duration::from_secs(2);

/// How often the server is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// The same where it does not let us: each attempt is a line in its log.
const FAILED_LOOK_INTERVAL: Duration = Duration::from_secs(600);
