//! The certificate that clients see, and its renewal while the relay runs.
//!
//! Owns the look at its files from time to time: whoever renews a certificate replaces files and may forget to say so. A
//! look, and no notice from the file system, because such files are often links that are exchanged as a whole. Exchanges
//! nothing itself: that is for the [`Reloader`], which knows what else was to be exchanged.

use std::{sync::Arc, time::Duration};

use crate::config;
use crate::conninfo::ProcessSurroundings;
use crate::metrics::DownstreamMetrics;
use crate::net::tls::{Changes, ServerTls};
use crate::relay::RelayError;
use crate::relay::reload::{Reloader, Replace, Watched};

/// Reads the files for the first time.
pub(super) fn read(
    settings: &config::Tls,
    metrics: &DownstreamMetrics,
) -> Result<Arc<ServerTls>, RelayError> {
    let tls = ServerTls::read(settings, &ProcessSurroundings).map_err(RelayError::Tls)?;
    show_expiry(&tls, metrics);
    Ok(Arc::new(tls))
}

/// Lets them be looked at. Never comes back.
pub(super) async fn watch(reloader: Arc<Reloader>) {
    loop {
        tokio::time::sleep(CHECK_INTERVAL).await;
        reloader.look().await;
    }
}

/// The files among those that are read again.
pub(super) struct TlsFiles {
    tls: Arc<ServerTls>,
    metrics: DownstreamMetrics,
}

impl TlsFiles {
    pub(super) fn new(tls: &Arc<ServerTls>, metrics: &DownstreamMetrics) -> Self {
        Self { tls: Arc::clone(tls), metrics: metrics.clone() }
    }
}

impl Watched for TlsFiles {
    fn changes(&self) -> Changes {
        self.tls.changes(&ProcessSurroundings)
    }

    fn read(&self) -> Result<Option<(Changes, Replace)>, String> {
        let renewed = self.tls.read_again(&ProcessSurroundings).map_err(|failure| failure.to_string())?;
        let Some(renewed) = renewed else { return Ok(None) };
        let (tls, metrics, changes) =
            (Arc::clone(&self.tls), self.metrics.clone(), renewed.changes().clone());
        let replace = move || {
            tls.replace(renewed);
            show_expiry(&tls, &metrics);
        };
        Ok(Some((changes, Box::new(replace))))
    }
}

fn show_expiry(tls: &ServerTls, metrics: &DownstreamMetrics) {
    // Seconds of this century are far below what a float holds exactly.
    #[allow(clippy::cast_precision_loss)]
    metrics.certificate_expires_at.set(tls.expires_at() as f64);
}

/// The files are looked at this often.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
